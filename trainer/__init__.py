"""Stage two: FOCAL and its rivals, meta-trained on stores. Knows no environment, so it is offline by construction.

Follow one training step of FOCAL through five files: `focal.py` (train_step; the encoder's update and loss),
`replay.py` (batches), `control.py` (the actor-critic's), `distance.py` and `divergence.py` (the mathematics). What they
use is in `networks.py` and `encoder.py` (the networks), `agent.py` (states) and `optimisers.py`; `training.py` takes
step after step, with logs and checkpoints. The rivals: `batch_pearl.py` (with `control.py`), `contextual_bcq.py` (with
`bcq.py`), `mbml.py` (with `bcq.py` and `mbml_teachers.py`). `loop.py` composes a run, `methods.py` lists the methods;
`inference.py` and `exporting.py` hand a trained policy to its user. Nothing is re-exported here: stage one imports
`trainer.networks` and `trainer.policies` alone, without paying for the rest.

Where a design choice of the paper acts, by setting (settings.py lists them all, and what each family differs in):

    distance.*                                  distance.py    the metric loss, its powers and the released form
    encoder.*                                   encoder.py     deterministic or a Gaussian posterior; its KL
    gradients                                   focal.py       update
    entropy.*                                   control.py     critic_targets, actor_loss
    regularisation.*                            divergence.py  dual KL or Wasserstein; control.py says where it enters
    context_*, task_replacement                 replay.py      what a step is drawn from
    schedule, encoder_steps, encoder_after      settings.py    encoder_rate, trains_control; focal.py obeys
    observation_scale, hide_x                   transform.py
    precision                                   optimisers.py  matrix_precision; weights and losses stay fp32
    value_limit                                 diagnostics.py value_bound; training.py stops the run there
    released.*                                  D1 focal.py; D2 divergence.py; D3, D4 control.py; D6 replay.py; D7
                                                agent.py
"""
