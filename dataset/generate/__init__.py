"""Data made with a language model: questions about marked objects (LLM-Seg40K), exemplars for
CoReS, other wordings of queries.

``python -m dataset.generate {questions,exemplars,rephrase} --help``; docs/generate.md has a worked
example. The way of ``questions``::

    scenes ─► captioner ─► questions ─► checks ─► LLM-Seg40K JSON
    (COCO)    (summary)    (chat)

    client: HTTP, retries, pace        journal: every request and reply, once

Only the model that answers is random. Its answers are in the journal, and the result is a function
of the flags, the files and the journal alone: a run that was killed goes on with the same command
and ends with the same files.
"""
