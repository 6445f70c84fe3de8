"""Two files for llama.cpp: the language model, and the eye with its projector.

    model, processor ──► why_no_gguf ──► model.gguf      (`text`, `vocabulary`)
                                         mmproj.gguf     (`eye`)
                                         Modelfile       (`modelfile`, for Ollama)

Nothing is rounded: tensors keep the precision they have, and `llama-quantize` makes them small.
Where the package `xllamacpp` is installed, `proof` loads the files with llama.cpp and compares
what it says of a fixed picture; this module knows no command line and no Hub.
"""

from mmlm.hub.gguf.export import save_gguf as save_gguf
from mmlm.hub.gguf.fits import why_no_gguf as why_no_gguf
from mmlm.hub.gguf.proof import Proof as Proof
from mmlm.hub.gguf.proof import prove as prove
