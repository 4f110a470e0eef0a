"""Find, check, adapt and load models.

Find:   source, hub, directory, companions, shards, library, lazy; gguf_import for GGUF files.
Check:  config, config_forms, derived_keys, reference, foreign_keys, check_settings, rotary,
        left_out.
Adapt:  architecture, quantized, renamed, expert_stacks, folded, tensor_names; all in `checkpoint`.
Run:    loader, sharding, dense, compact, trainable, narrow_experts, expert_products, prompt_cache,
        half_cache, footprint, chat_template.
"""
