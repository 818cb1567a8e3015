"""What a request costs here and elsewhere: a stub, a load, contenders, figures, a picture.

Runs on 127.0.0.1 only, bounded in count and time; never imported by the product.
"""
