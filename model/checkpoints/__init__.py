"""Files of models: what a folder or hub name holds, in which layout, and its weights under our
names."""
