"""Stage two: FOCAL meta-training on stores. Knows no environment, so it is offline by construction.

Follow one training step through five files: `loop.py` (composition, logs, checkpoints), `replay.py` (batches),
`focal.py` (the update and its losses), `distance.py` and `divergence.py` (the mathematics); the networks themselves are
in `networks.py` and `encoder.py`. Nothing is re-exported here: stage one imports `trainer.networks` and
`trainer.policies` alone, without paying for the rest.

Where a design choice of the paper acts, by setting (settings.py lists them all, and what each family differs in):

    distance.*                                  distance.py    the metric loss, its powers and the released form
    encoder.*                                   encoder.py     deterministic or a Gaussian posterior; its KL
    gradients, entropy.*                        focal.py       update, encoder_loss, critic_targets, actor_loss
    regularisation.*                            divergence.py  dual KL or Wasserstein; focal.py says where it enters
    context_*, task_replacement                 replay.py      what a step is drawn from
    schedule, encoder_steps, encoder_after      settings.py    encoder_rate, trains_control; loop.py obeys
    observation_scale, hide_x                   transform.py
    released.*                                  D1, D3, D4 focal.py; D2 divergence.py; D6 replay.py; D7 agent.py
"""
