"""What a run computes with: the step, its update, the schedule, the state that a checkpoint keeps."""
