"""How local self-attention is: measured per layer, reported, drawn, turned into kernel sizes."""
