"""The pack's nodes: they translate between ComfyUI and the core, and compute nothing themselves."""
