"""One file per library that the core plugs into; the only places that import that library."""
