"""RegSL's layer-wise constraints on clean labels: `:indoor` (default), aircraft, cub, caltech, cars, dogs or flowers.

    python main.py --config=configs/regsl.py:cub --config.data_dir=DATA
    python main.py --config=configs/regsl.py:cub --config.data_dir=DATA --config.methods.layerwise.distance= \
        --workdir=runs/cub-plain

Li and Zhang, "Improved Regularization and Robustness for Fine-tuning in Neural Networks" (NeurIPS 2021):
torchvision's ResNet-101, Adam with amsgrad, 30 epochs, and radii that the authors tuned for each set. TFDS has
neither MIT-Indoor nor Caltech-256; DATA holds them as folders. MIT-Indoor is sorted into folders by its lists (run
this in `Images`, with a copy of TrainImages.txt and TestImages.txt):

    while read f; do install -D -m 644 "$f" "DATA/mit_indoor/train/$f"; done < TrainImages.txt
    while read f; do install -D -m 644 "$f" "DATA/mit_indoor/test/$f"; done < TestImages.txt

Caltech-256 is used as published, DATA/caltech256/<class>/<image>; the others after `python -m ft_jax.data.prepare
tfds:<name>`.

Differences from the authors' code: val is a tenth of each class (there, of all images; its size is theirs for
caltech, flowers and aircraft). Caltech-256's images are sampled by the seed (there, the first ones on disk), and all
others are test images (there, 20 per class). Flowers has its official split (there, a random one of the same sizes).
Heads start at N(0, 2/d) (there, torch's uniform initialization). All 30 epochs are run (there, training stops after
ten without a better val accuracy; both use the best checkpoint on val).
"""

from ml_collections import ConfigDict

from configs import default

# (D, radius of the head, gamma), name of the set, training split, val split, test split, images per epoch.
SETS: dict[str, tuple[tuple[float, float, float], str, str, str, str, int]] = {
    'indoor': ((0.136810, 6.407802, 2.528838), 'folder:mit_indoor', 'train', '', 'test', 4824),
    'aircraft': ((1.183306, 5.277136, 1.276800), 'tfds:fgvc_aircraft', 'train', 'validation', 'test', 3334),
    'cub': ((0.204404, 23.785061, 4.738036), 'tfds:caltech_birds2011', 'train', '', 'test', 5395),
    'caltech': ((0.086800, 9.455294, 1.178599), 'folder:caltech256', 'train', '', 'rest', 7680),
    'cars': ((1.334035, 8.269408, 3.476768), 'tfds:cars196', 'train', '', 'test', 7330),
    'dogs': ((0.056132, 4.462818, 1.587226), 'tfds:stanford_dogs', 'train', '', 'test', 10800),
    'flowers': ((0.131991, 10.767413, 4.980102), 'tfds:oxford_flowers102', 'train', 'validation', 'test', 1020),
}


def get_config(name: str = 'indoor') -> ConfigDict:
  if name not in SETS:
    raise ValueError(f'unknown set {name!r}; expected :{", :".join(SETS)} after the name of the config')
  (radius, head_radius, growth), target, train, val, test, images = SETS[name]
  config = default.get_config()
  config.target.name, config.target.train, config.target.val, config.target.test = target, train, val, test
  if name == 'caltech':  # 30 images per class for training and 20 for val
    config.target.train_per_class = 50
    config.target.val_fraction = 0.4
    config.target.without = ('257.clutter',)
  config.selection.method = 'none'
  config.augment.antialias = True  # Pillow's filter, as in the published code
  config.model.name = 'resnet101'
  config.model.weights = 'timm:resnet101.tv_in1k'  # torchvision's own weights
  config.methods.layerwise.distance = 'frobenius'
  config.methods.layerwise.radius = radius
  config.methods.layerwise.growth = growth
  config.methods.layerwise.head_radius = head_radius
  config.train.batch_size = 16 if name == 'flowers' else 32
  config.train.epochs = 30.0
  config.train.optimizer = 'amsgrad'
  config.train.learning_rate = 1e-4
  config.train.learning_rate_groups = (('.*', 1.0),)  # the same rate for heads
  config.train.weight_decay = 0.0
  config.train.schedule = 'milestones'  # x 0.1 after epochs 10 and 20
  config.train.milestones = (1 / 3, 2 / 3)
  config.train.decay = 0.1
  config.train.eval_every = round(images / config.train.batch_size)  # once an epoch
  return config
