"""Tests of incbak.files."""
