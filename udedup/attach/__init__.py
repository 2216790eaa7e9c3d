"""Coming into programs that run already, and going out of them again: ``udedup attach`` and ``udedup detach``.

``session`` does it, step by step; ``refusal`` says beforehand why not; the rest is what these have to know of a
program. What happens to its threads is ``native/engine/attach.c``.
"""
