from .writing import write_label_map as write_label_map
