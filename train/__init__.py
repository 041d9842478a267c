"""The scripts: align.py runs the method, the others a part of it; command.py is what they share.

Run them by path (`torchrun train/align.py`). Installed as `ldalign.train`.
"""
