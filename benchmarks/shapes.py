"""The named shapes that the asv suite and the README's table time, each with its origin: one list for both."""

from numba_attn.app.bench import Case

SHAPES = {
    # name: case. heads, kv_heads, q_len, kv_len, dim; causal is aligned bottom right
    "full 1k": Case(8, 8, 1024, 1024, 64),  # a text encoder, or the field's usual microbenchmark
    "causal 2k": Case(8, 8, 2048, 2048, 64, causal=True),  # GPT-2's head size, prefill
    "head size 128 2k": Case(8, 8, 2048, 2048, 128),  # Llama's and Qwen's head size
    "window 256 of 4k": Case(
        8, 8, 4096, 4096, 64, causal=True, window=256
    ),  # Gemma's and Mistral's local layers, scaled down
    "grouped heads 32/8": Case(32, 8, 1024, 1024, 128, causal=True),  # Llama 3 8B, prefill
    "batch of short texts": Case(12, 12, 128, 128, 64, batch=8),  # BERT base, a batch of sentences
    "ragged 333 x 777": Case(
        8, 8, 333, 777, 80, batch=2
    ),  # cross-attention, lengths and head size (Phi-2) of no round number
    "tiny 16 x 16": Case(8, 8, 16, 16, 64, causal=True),  # what a call costs before any work
    "one head 8k": Case(1, 1, 8192, 8192, 64),  # one head, a long sequence
    "float64 2k": Case(8, 8, 2048, 2048, 64, dtype="float64"),  # simulation, gradient checks
    # Forward and backward: what a training step costs.
    "train full 1k": Case(8, 8, 1024, 1024, 64, backward=True),
    "train causal 2k": Case(8, 8, 2048, 2048, 64, causal=True, backward=True),
    "train head size 128": Case(8, 8, 1024, 1024, 128, backward=True),
    "train grouped heads 16/4": Case(16, 4, 1024, 1024, 64, causal=True, backward=True),
    "train window 256 of 4k": Case(8, 8, 4096, 4096, 64, causal=True, window=256, backward=True),
    "train float64 1k": Case(8, 8, 1024, 1024, 64, dtype="float64", backward=True),
}
