"""As for the tests of training: one process and no network, before TRL is imported."""

from tests.training import conftest as conftest
