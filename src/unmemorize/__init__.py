"""Find, isolate and remove what a model has memorized, neuron by neuron, and prove it."""
