"""Talking to people and programs: the chat page, the OpenAI-compatible API, the terminal.

    assistant ──► serving
                  you are here

`engine` gives a few answers at a time, fair between clients, and says what they cost; `about`
reads what an assistant has learned to see; `chat_ui` is the page, `seen_ui` the part of it that
shows what the model saw, `openai_api` the API, `serve` the process around it. Pictures from
strangers come in through `fetch`, which obtains bytes safely; `mmlm.images` opens them. How an
answer is generated is in `mmlm.generation`.
"""
