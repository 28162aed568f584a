"""RegSL's layer-wise constraints on clean labels: `:indoor` (default), aircraft, cub, caltech, cars, dogs or flowers.

    python main.py --config=configs/regsl.py:cub --config.data_dir=DATA
    python main.py --config=configs/regsl.py:cub --config.data_dir=DATA --config.methods.layerwise.distance= --workdir=runs/cub-plain

Li and Zhang, "Improved Regularization and Robustness for Fine-tuning in Neural Networks" (NeurIPS 2021): torchvision's ResNet-101, Adam
with amsgrad, 30 epochs, and radii that the authors tuned for each set. MIT-Indoor and Caltech-256 are none of TFDS's: DATA holds them as
folders. Indoor's images in the folders of its lists (in `Images`, with a copy of TrainImages.txt or TestImages.txt):

    while read f; do mkdir -p DATA/mit_indoor/train/${f%/*}; cp "$f" DATA/mit_indoor/train/${f%/*}/; done < TrainImages.txt
    while read f; do mkdir -p DATA/mit_indoor/test/${f%/*}; cp "$f" DATA/mit_indoor/test/${f%/*}/; done < TestImages.txt

Caltech-256 as it is published, DATA/caltech256/<class>/<image>; the others after `python -m ft_jax.data.prepare tfds:<name>`.

Ours: val has a tenth of each class (there, of all images; its size is theirs for caltech, flowers and aircraft), Caltech-256's images
are drawn by the seed (there, the first ones in the order of the disk) and all that are left are for test (there 20 a class), Flowers has
its official split (there, a random one of the same sizes), heads start at N(0, 2/d) (there torch's uniform), and all 30 epochs are run
(there, none after ten without a better val accuracy; the best checkpoint on val is what counts in both).
"""

from ml_collections import ConfigDict

from configs import default

# D, radius of the head, gamma; name of the set; split for training; val split; test split; images of an epoch.
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
    raise ValueError(f'the set {name!r} is not known; write :{", :".join(SETS)} behind the name of the config')
  (radius, head_radius, growth), target, train, val, test, images = SETS[name]
  config = default.get_config()
  config.target.name, config.target.train, config.target.val, config.target.test = target, train, val, test
  if name == 'caltech':  # 30 of each class to train on and 20 for val
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
  config.train.learning_rate_groups = (('.*', 1.0),)  # heads have no faster one
  config.train.weight_decay = 0.0
  config.train.schedule = 'milestones'  # x 0.1 after epochs 10 and 20
  config.train.milestones = (1 / 3, 2 / 3)
  config.train.decay = 0.1
  config.train.eval_every = round(images / config.train.batch_size)  # once an epoch
  return config
