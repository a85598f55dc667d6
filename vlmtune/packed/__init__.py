"""Packed trials: several trials (adapters) in one batch, over one frozen base on each device.

This is not TRL's `packing`, which puts several examples of one run into one sequence. Here each example keeps
a row of its own, and each row uses the adapter of its trial.

The modules, from the outside in:

    packed_trial, train_packed   what Tune and `train.py` run; both use engine_client
    engine_client, messages      a trial's side of an engine
    engine_pool, engine_actor    engines as Ray actors; trial_registry: their trials, engine_loop:
                                 their thread
    engine                       rounds over all trials: example_cache, trial_evaluator,
                                 checkpoint_writer
    slot                         one trial: slot_adapter (optim, host_copies), rows_cursor, trial_progress,
                                 step_totals, trial_records; its files: trial_checkpoint, checkpoint_folder
    packed_model                 forward and backward passes of packed batches: packed_batch, layers,
                                 adapter_binding, loss, row_features
    build, packable              the plan of an engine's memory; which settings can be trained packed
    worker_shard                 one trial's rows on several workers
"""
