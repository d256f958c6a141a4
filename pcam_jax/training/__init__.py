"""Pure training: state, steps, optimizers and the control of a run."""
