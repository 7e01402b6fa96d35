"""Stage two: FOCAL meta-training on stores. Knows no environment, so it is offline by construction.

Follow one training step through `loop.py` (composition, logs, checkpoints), `replay.py` (batches), `focal.py` (the
update and its losses), `distance.py` and `divergence.py` (the mathematics), `networks.py`. Nothing is re-exported here:
stage one imports `trainer.networks` and `trainer.policies` alone, without paying for the rest.
"""
