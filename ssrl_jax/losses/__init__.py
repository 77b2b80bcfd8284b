"""Pure objectives: arrays in, values out. No parameters, no state, no collectives."""
