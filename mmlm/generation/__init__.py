"""Answering: one path for chat, evaluation and server.

    processing, modeling ──► generation ──► assistant ──► evaluation, serving
                             you are here

`settings` says how to answer, `batch` answers many requests at once (the same text as one by
one), `stream` gives an answer piece by piece, `chat` keeps a conversation. Everything goes
through `generate` of transformers, so that whatever works there works here.
"""

from mmlm.generation.batch import Answer as Answer
from mmlm.generation.batch import answer_batch as answer_batch
from mmlm.generation.chat import Chat as Chat
from mmlm.generation.settings import GenerationSettings as GenerationSettings
from mmlm.generation.settings import Request as Request
from mmlm.generation.stream import stream as stream
