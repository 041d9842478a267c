"""The scripts: align.py runs the method, the others a part of it; command.py is what they share.

The console command `ldalign` (ldalign/cli.py) starts them, or they are run by path (`torchrun
train/align.py`). Installed as `ldalign.train`.
"""
