"""Small trained additions beside the weights of a model, through PEFT."""
