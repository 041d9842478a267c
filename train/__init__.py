"""The training scripts, one stage each; run them by path (`torchrun train/align.py`). Installed as
`ldalign.train`.
"""
