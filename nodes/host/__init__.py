"""Everything that reads or changes ComfyUI's models, patches, samplers and folders."""
