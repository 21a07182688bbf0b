"""parity: where does a port of a language model differ from transformers, and is it a bug or rounding?"""
