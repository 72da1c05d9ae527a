"""Where arrays live: the mesh and its partition rules, jobs of several processes."""
