"""What stands behind train.py: the parts of a run that have a specification or a second reader of their own.

    settings          reading YAML and --override into a schema of dataclasses, by rosbag_dataset's reader
    checks            rules between settings
    grid              the runs of a sweep, each with its name and settings
    ranks             several processes as one run: their store, their sums, the news that one has failed
    stopping          SIGTERM and Ctrl-C as a request
    feed              the order of samples, the loader, frames on the device, batches as the model takes them
    augment           random changes of training images
    device            precision, torch.compile's needs, reading from the device without waiting for it
    graphs            a step as one CUDA graph
    validation        the policy in float32 on held-out episodes
    initial_weights   the image backbone's weights to start from
    init_from         another policy's weights and statistics to start from
    averaging         the policy as a moving average of the weights
    run_dir           the output directory: one run at a time, what to resume from, what to replace
    metrics           metrics.jsonl, and the pace that is logged in it
    identity          what a run is compared by when it resumes, and the robot's contract
    trackers          Weights & Biases, or nothing in its place
    summary           the end of a run: one screen, summary.json, a picture
    failures          every error as one line
    errors            the errors themselves

No room imports train: the schema, its defaults and the story of a run are there.
"""
