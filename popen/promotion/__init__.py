"""From a trained model to the one that serves: the gate, MLflow's registry, the champion as opponent.

Flows and the command line use this; nothing in the pipeline's stages does.
"""
