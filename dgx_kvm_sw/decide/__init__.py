"""Pure decisions: values in, values out; cannot touch the machine."""
