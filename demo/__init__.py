"""How the embedded demo model was made: pictures, questions, training, evaluation."""
