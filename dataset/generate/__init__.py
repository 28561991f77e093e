"""Data made with a language model: questions about marked objects (LLM-Seg40K), exemplars for
CoReS, other wordings.

``python -m dataset.generate {questions,exemplars,rephrase} --help``; docs/generate.md has a worked
example.

::

    scenes ─► captioner ─► questions ─► checks ─► LLM-Seg40K JSON        client: HTTP, retries, pace
    (COCO)    (summary)    (chat)                                        journal: every request and reply, once

Everything random is in the model that answers. What it said is in the journal, and the result is a
function of the flags, the files and the journal alone: a run that was killed goes on with the same
command and ends with the same files.
"""
