"""Demo models: the text they are trained on, their recipe, their packed weights and their figures."""
