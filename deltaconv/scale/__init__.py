"""Distillation at scale, behind the extra [train]: many processes, stored data, a board.

No node imports this folder. torch.distributed does the communication, by way of Accelerate.
"""
