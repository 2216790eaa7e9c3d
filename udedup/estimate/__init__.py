"""What would be shared: a look from outside at the memory of processes that know nothing of it.

:class:`udedup.estimate.survey.Survey` looks, C behind cffi; ``figures`` are what it finds, ``tables`` and ``page`` show
them, and ``processes`` says whose memory there is. The study of Barker et al. (USENIX ATC 2012) as a command.
"""
