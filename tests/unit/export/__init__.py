"""Tests of incbak.export."""
