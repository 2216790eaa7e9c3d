"""The live view, ``udedup top``.

``rates`` makes figures per second of two answers of the engine, ``columns`` and ``screen`` lines of text of these, and
``view`` knows what each key does: all of that takes and gives plain values. ``terminal`` and ``live`` do the rest.
"""
