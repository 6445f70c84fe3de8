"""Talking to people and programs: the chat page, the OpenAI-compatible API, the terminal.

    assistant ──► serving
                  you are here

`engine` gives answers one at a time and says what they cost; `about` reads what an assistant
has learned to see; `chat_ui` is the page, `openai_api` the API. Pictures from strangers come
in through `fetch`, which obtains bytes safely; `mmlm.images` opens them. Nothing here knows
how an answer is generated (see `mmlm.generation`).
"""
