"""Vocabulary-sized work in a fixed workspace: row chunks x vocabulary blocks, GEMMs, tile ops."""
