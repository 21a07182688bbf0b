"""Activations to look at: what a dump holds, by layer and site, without a word about right and wrong."""
