"""Train ternary (1.58-bit) networks from scratch.

Importing the package imports nothing heavy. The parts, from the bottom up: ``quant`` (the arithmetic), ``kernels``
(the same arithmetic behind one op with several backends), ``nn`` (modules), ``data`` (text to token shards),
``evaluation``, ``training`` / ``export`` / ``planning``, and ``commands`` (one file per command).
"""

__version__ = "0.1.0"
