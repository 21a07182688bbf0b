"""Worked examples of candidates: models written from scratch, knowing nothing of parity."""
