"""An `evaluate` module: load it with `evaluate.load(peft_calib.metric_path("decision"))`."""
