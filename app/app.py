"""A Hugging Face Space on one model of MMLM; the code is in `mmlm.serving.chat_ui`.

The model is the folder `model/` beside this file, or what the variable MMLM_MODEL names: a
folder or a Hub id. Two names, separated by a comma, are shown side by side.
"""

import os
from pathlib import Path

from mmlm.serving.chat_ui import serve_page


def main() -> None:
    beside = str(Path(__file__).parent / "model")
    names = os.environ.get("MMLM_MODEL", beside).split(",")
    serve_page(
        [name.strip() for name in names],
        host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
    )


if __name__ == "__main__":
    main()
