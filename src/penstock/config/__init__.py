"""What the user asked for and what the model is: schema, loading, shapes. Knows no tensor and no engine."""
