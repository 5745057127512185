"""Tests of incbak.report."""
