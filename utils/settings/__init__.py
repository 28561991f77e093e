"""What a run is told: flags, YAML files and how they combine."""
