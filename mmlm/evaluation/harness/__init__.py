"""With the field's harnesses: our models inside lmms-eval and VLMEvalKit, our answers under theirs.

    assistant ──► harness ──► lmms-eval, VLMEvalKit
                  you are here

`lmms_eval_model` is found by `lmms-eval --model mmlm` after installation, `vlmevalkit_model` is
imported by a VLMEvalKit configuration, `rescore` marks a file of predictions with lmms-eval's own
functions. Nothing here imports a harness before it is asked for.
"""
