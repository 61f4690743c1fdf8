"""Run a job from start to end: plan, schedule, collect, commit, finalize.

    driver             runs a job: makes or reads the plan, starts a session, finalizes the output
    retry              reads an output's rejects again, as a new generation of it
    session            does the unfinished parts of a plan, with the files below
    scheduler          runs parts again whose workers hang or are lost, or when there could be more workers
    result_consumer    consumes a runner's results on a background thread
    stall_detector     detects that no batch arrives any more, and reports where the work hangs
    stragglers         decides when idle workers should run the last parts too
    graceful_stop      handles SIGTERM and Ctrl-C
    part_collector     collects batches until their part is complete
    committer          encodes complete parts and commits them
    run_report         counts what a session does, and stores the counts while it works
    session_metrics    turns these counts into samples for Prometheus
    measure            times a sample of a job and estimates the whole, without writing anything
    pixel_drift        compares the two kinds of `preprocess` on the sample's images
    class_weights      makes the classifiers of models whose classes are prompts, once for an output
    sample_source      cuts each part short for `measure`, and estimates how many images it has

Ray 2.60 and other libraries have an answer to much of this. Why ours stays:

* Stall detection (`stall_detector`). Ray Data's hanging-task detector only logs: a task that takes ten standard
  deviations longer than the others of its operator, once ten have finished. `execution_no_progress_timeout_s` ends the
  whole execution. Neither names parts, replaces the workers that hang, or exists for the local runner.
* Stragglers (`stragglers`). Ray has no speculative execution, in Core or in Data: one slow node or hanging task holds
  up the end of a job. Spark has it (`spark.speculation`), in its own scheduler.
* Growing and shrinking (`scheduler`, `runners.ray_data`). `ActorPoolStrategy(min_size=, max_size=)` scales each pool up
  to a maximum that is fixed at the start, as the number of read tasks is; an actor whose node is gone for good waits
  for room without end, and its blocks with it. A new graph of the unfinished parts sizes every pool by what is there.
* Crash isolation (`isolation`). By default Ray retries a block that kills its worker for ever; with `max_restarts`,
  `max_task_retries` and `max_errored_blocks` it drops the whole block, good rows included, with a line in a log. pebble
  and loky notice that a worker has died, but not of which row. Ours turns that row alone into a reject, and covers the
  driver's own process too.
* Submitting (`submit`). The upload, the log and the stop are Ray's own `JobSubmissionClient`. `ray job submit` would
  upload the current folder; ours uploads only the job and the package, checks versions first, and gives the same job
  the same id, so that submitting it twice follows the first one.
"""
