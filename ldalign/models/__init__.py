"""The networks and the folders they come from: Mistral, GPT-2, the guide, weights in and out."""
